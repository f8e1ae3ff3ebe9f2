import pytest

from mlops.registry.location import without_secrets


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/mnt/models@2/a?b", "/mnt/models@2/a?b"),
        ("s3://bucket/models@2", "s3://bucket/models@2"),
        ("s3://key:secret@bucket/models", "s3://bucket/models"),
        ("https://u:p@ss@host:1/a?token=secret#secret", "https://host:1/a"),
        (
            "no way to 'ftp://u:p@host/a?x=1' and ftp://host2/?y",
            "no way to 'ftp://host/a and ftp://host2/",
        ),
        ("simplecache::ftp://u:p@host/a", "simplecache::ftp://host/a"),
    ],
)
def test_passwords_and_queries_are_not_shown(text: str, shown: str) -> None:
    assert without_secrets(text) == shown
