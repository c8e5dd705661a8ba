"""What the machine could do, and what we and others do: times, memory, compilation, over a table of sizes."""
