"""What the machine gives and keeps: `memory` and how much goes through a model at once (`portions`), threads
(`background`) and processes (`workers`), time (`stopwatch`), and what is made only once (`cache`)."""
