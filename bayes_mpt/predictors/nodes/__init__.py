"""Conditionals of programs that are tractable once a few latents are given: averages over weighted nodes."""
