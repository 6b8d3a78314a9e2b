"""Nodes for measuring slow links on one machine: network namespaces with a link of any delay and rate between them."""
