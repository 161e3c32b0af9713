"""What DS-Sync costs beside its peers, on a cluster emulated on one machine (not part of the wheel)."""
