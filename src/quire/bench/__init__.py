"""Speed, measured beside what the memory gives: verified first, then timed, in turns."""
