"""Sparse upcycling under the FLAN-MoE protocol. See README.md."""
