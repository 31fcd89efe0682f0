"""Tests of lepton.data."""
