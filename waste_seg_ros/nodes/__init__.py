"""ROS 2 nodes: thin, each a module with ``main(args=None)``; the work is done in the core."""
