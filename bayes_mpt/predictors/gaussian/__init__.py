"""Exact conditionals by Gaussian algebra: linear maps, chains, one vector of rows, its nearest neighbours."""
