"""Speed: one module for each mechanism. All give the same bits, except the compiled update."""
