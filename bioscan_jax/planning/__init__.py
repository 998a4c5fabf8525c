"""What a step needs and costs on TPUs that are not here, from the real compiler."""
