"""Generated from protos/countersign/v1: do not edit, run `make protos`."""
