"""What keeps a deployment or a device from working, or stands open: `diagnosis.diagnose`."""
