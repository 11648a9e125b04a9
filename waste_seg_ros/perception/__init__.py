"""From a network's prediction to items: grouping, geometry, grasp and drawing."""
