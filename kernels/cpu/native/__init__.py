"""Our own code for processors with AVX-512, in C++: products, attention and what lies between, with bits of a row that
depend on nothing but itself."""
