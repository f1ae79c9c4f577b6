"""Measurements behind the project's claims; each room and each file runs by itself: ``python -m
benchmarks.<name>``.
"""
