"""The methods and the contract that they keep."""
