import pytest

from countersign.services.runtime import errors
from countersign.services.runtime.errors import CountersignError, InvalidArgument

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, CountersignError)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_arrives_as_it_was_sent(kind: type[CountersignError]) -> None:
    sent = kind("it broke", reason="BROKEN", help="mend it", place="here")
    got = CountersignError.from_status(sent.to_status())
    assert type(got) is kind
    assert (got.message, got.reason, got.help, got.metadata) == ("it broke", "BROKEN", "mend it", {"place": "here"})
    assert str(got) == "it broke (mend it)"


def test_long_texts_are_clipped_so_that_they_fit_grpc_headers() -> None:
    status = InvalidArgument("x" * 100_000, help="y" * 100_000, prompt="z" * 100_000).to_status()
    assert len(status.SerializeToString()) < 4096


def test_a_text_that_is_no_unicode_is_sent_all_the_same() -> None:
    assert CountersignError.from_status(InvalidArgument("file \udcff").to_status()).message == "file ?"
