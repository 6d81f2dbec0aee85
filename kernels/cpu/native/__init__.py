"""Our own code for processors with AVX-512 or AVX2, in C++: products, attention and what lies between, with bits of a
row that depend on nothing but itself."""
