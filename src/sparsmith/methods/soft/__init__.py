"""SoFT, Sorted Fine-Tuning: one model that runs at many depths. See README.md."""
