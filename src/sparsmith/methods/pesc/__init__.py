"""PESC: parameter-efficient sparsity crafting. One shared FFN per block, experts that differ by adapters."""
