"""Times, memory and compilation of ours, of plain matrix products and of other libraries, over a table of sizes."""
