"""Where tiles come from: Agriculture-Vision folders, pairs of rasters, invented fields."""
