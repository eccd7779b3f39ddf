"""Nets, scripted players, and the way from a file to a frozen policy that acts."""
