"""Modelled workers: a test and benchmark tool, never a product path."""
