"""What training reads: examples encoded once, and the samples drawn from them."""
