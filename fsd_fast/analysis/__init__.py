"""What a student kept of its teacher: layers compared, structures restored, sizes, speeds, and a report of it all."""
