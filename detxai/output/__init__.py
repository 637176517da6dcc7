"""What is written: records, pictures, and the store that puts them in place. Stands on evidence, and on no torch."""
