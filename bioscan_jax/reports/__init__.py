"""Reports of vector tables: one HTML page and PNG pictures."""
