"""Bytes that arrive in pieces -> text, without ever cutting a character."""

import codecs


class Utf8Stream:
    """Decode UTF-8 piece by piece; what is no UTF-8 becomes U+FFFD.

    Whatever the pieces, the texts together equal ``data.decode("utf-8", "replace")``.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, data: bytes) -> str:
        """Return the text that is certain by now; the start of a character waits for its rest."""
        return self._decoder.decode(data)

    def finish(self) -> str:
        """Return what still waits, as U+FFFD, and start afresh."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
