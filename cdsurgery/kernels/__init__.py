"""Rows times the unembedding -> what the scan needs to know of their logits, without the logits."""
