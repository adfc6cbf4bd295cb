"""FineGates: learned stochastic gates that cut a model to size while it is tuned. See README.md beside this file."""
