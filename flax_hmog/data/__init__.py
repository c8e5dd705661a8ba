"""Sources of samples: arrays, tables, files, sparse matrices, streams; read by blocks, spread over devices."""
