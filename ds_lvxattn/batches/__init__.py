"""Samples to micro-batches: layout over the ranks, collation, loading ahead, and the attached model."""
