"""A Pyro program as an object: what it is made of, how it runs, its linear-Gaussian map, densities and parameters."""
