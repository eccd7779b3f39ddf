"""Matches between policies, and how sure their results are."""
