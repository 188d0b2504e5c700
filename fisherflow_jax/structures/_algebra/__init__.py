"""What structures share: dense blocks, eigenbases, products of layers' vectors."""
