"""`mlops demo`: the whole way from training to an answer over HTTP, on real parts."""
