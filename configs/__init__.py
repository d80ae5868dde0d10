"""One YAML recipe per result, read as package resources."""
