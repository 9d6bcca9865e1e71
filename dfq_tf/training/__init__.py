"""What any training needs: loop, optimizers, devices."""
