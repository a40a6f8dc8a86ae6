"""Tests that bring up real clusters with Ray's launcher, on machines that `lab` makes of namespaces."""
