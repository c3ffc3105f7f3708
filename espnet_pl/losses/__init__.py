"""Pure maths: tensors in, nats out; no state, no files, torch only."""
