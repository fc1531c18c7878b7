"""URLs as others may see them: passwords, and the tokens of signed addresses, let in whoever reads them."""

import re

_URL = re.compile(r"""\b[a-zA-Z][a-zA-Z0-9+.-]*://(?:[^\s/?#"<>]*@)?[^\s'"<>`]+""")
_USER = re.compile(r"(?<=://)[^/?#\s]*@")
_VALUE = re.compile(r"(?<=[?&#;])([^=&#;?]+=)[^&#]+")


def public(url: str) -> str:
    """Return a URL without what lets somebody in.

    What stands before the host goes where it is a user with a password, or of a web page; of other schemes, a name
    alone may be part of the place (`abfs://container@account`). What a query or fragment gives its keys is left out.
    """
    user = _USER.search(url)
    if user is not None and (":" in user[0] or url.lower().startswith("http")):
        url = url[: user.start()] + url[user.end() :]
    return _VALUE.sub(r"\1…", url)


def public_text(text: str) -> str:
    """Return a text with all URLs in it as `public` shows them."""
    return _URL.sub(lambda found: public(found[0]), text)
