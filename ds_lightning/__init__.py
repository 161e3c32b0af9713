"""Divide-and-Shuffle Synchronization (DS-Sync, arXiv 2007.03298) for PyTorch Lightning."""
