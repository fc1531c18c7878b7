"""`python -m tests.docs`: renews the generated parts of the pages in docs/."""

from tests.docs.pages import stale

for page, text in stale():
    page.write_text(text)
    print(f"{page}: renewed")
