"""What others may see of URLs."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sensmerge.tasks.errors import InputError, StepError
from sensmerge.tasks.urls import public, public_text


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://user:secret@host:5000/mlflow", "https://host:5000/mlflow"),
        ("https://token@host/x", "https://host/x"),
        ("sftp://team:p@ss@host/store", "sftp://host/store"),
        ("sftp://team@host/store", "sftp://team@host/store"),
        ("abfs://container@account.dfs.core.windows.net/x", "abfs://container@account.dfs.core.windows.net/x"),
        ("s3://bucket/team@home/x", "s3://bucket/team@home/x"),
        ("https://host/a@b?X-Amz-Signature=abc&Expires=5", "https://host/a@b?X-Amz-Signature=…&Expires=…"),
        ("https://host/rows-?.jsonl", "https://host/rows-?.jsonl"),
        ("https://host/x?sig=abc;def&b=1", "https://host/x?sig=…&b=…"),
        ("https://host/#access_token=abc", "https://host/#access_token=…"),
    ],
)
def test_passwords_and_tokens_go(url: str, shown: str) -> None:
    assert public(url) == shown
    assert public(shown) == shown


WORD = st.text("abcXYZ0189-_.~%", min_size=1, max_size=12)


@given(st.sampled_from(["http", "https", "ftp", "sftp", "s3", "HTTPS"]), WORD, WORD, st.lists(WORD), WORD)
def test_no_secret_is_left_in_any_text(scheme: str, user: str, host: str, path: list[str], key: str) -> None:
    secret = "canary!$'1`"
    url = f"{scheme}://{user}:{secret}@{host}/{'/'.join(path)}?{key}=canary;x&{key}=canary#{key}=canary"
    text = f"cannot read '{url}', nor {url}: it answered 404; <{url}> (twice)"
    for shown in (public_text(text), str(InputError(text)), str(StepError(text))):
        assert "canary" not in shown
    assert public_text(text).startswith(f"cannot read '{scheme}://{host}/")


def test_what_stands_beside_a_url_stays() -> None:
    text = '{"url":"https://host/x","mail":"a:b@c"} or "https://host","a:b@c"'
    assert public_text(text) == text


def test_errors_travel() -> None:
    for kind in (InputError, StepError):
        text = str(pickle.loads(pickle.dumps(kind("at https://u:p@host?a=b no"))))
        assert text == "at https://host?a=… no"
