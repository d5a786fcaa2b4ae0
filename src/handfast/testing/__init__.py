"""Shipped tests: conformance suites for tiers, and files that fail where you say."""
