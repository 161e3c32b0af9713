"""Tests, cheapest first: pure Python, forked gloo ranks, then real Trainer runs on forked ranks."""
