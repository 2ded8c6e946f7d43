"""Prices, costs and reports. Never imports torch or triton."""
