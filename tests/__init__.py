"""The suite is a package, so that tests/ may mirror the packages without its folders shadowing them."""
