"""Attention over ranks, each of which holds a part of the keys.

partition -> which positions a rank holds; layout -> a batch cut that way; schedule -> pure plans of TokenRing, Ring and
all-gather-Q; traffic -> the bytes they move; local -> one rank's attention; execute -> a plan carried out over a
transport: threads, streams of one GPU, or torch.distributed.
"""
