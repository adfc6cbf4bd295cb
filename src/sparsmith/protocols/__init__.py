"""The papers' comparisons, each as one command."""
