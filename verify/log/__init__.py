"""A transparency log: entries in an RFC 9162 Merkle tree that only grows, in C2SP's formats.

    tiles       names and bytes of tiles and entry bundles                c2sp.org/tlog-tiles
    store       ``TileLog``: a folder of tiles, appended to through a journal
    proofs      roots and proofs from tiles, wherever they are fetched from
    checkpoint  size and root of a log, signed and cosigned               c2sp.org/tlog-checkpoint, /signed-note

The entry of a receipt is the bare receipt (``receipt.strip``): exactly the bytes of which ``receipt_digest`` is the
SHA-256. They tell who signed what about which sizes and digests, and nothing of any text.
"""
