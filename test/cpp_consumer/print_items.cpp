// Prints one line for each item on the topic `items`, for as many messages as the argument says.
//
// An arm controller would use rclcpp. This uses the layer below rclcpp and rcl, with the same C++
// messages, so that it builds with the ROS wheels too: they have no rclcpp, and their rcl needs
// Python.

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>

#include "rcutils/strdup.h"
#include "rmw/error_handling.h"
#include "rmw/rmw.h"
#include "rosidl_typesupport_cpp/message_type_support.hpp"
#include "waste_seg_ros/msg/waste_item_array.hpp"

using waste_seg_ros::msg::WasteItem;
using waste_seg_ros::msg::WasteItemArray;

static void check(bool good)
{
  if (!good) {
    std::fprintf(stderr, "%s\n", rmw_get_error_string().str);
    std::exit(1);
  }
}

int main(int argc, char ** argv)
{
  const int wanted = argc > 1 ? std::atoi(argv[1]) : 1;
  const char * domain = std::getenv("ROS_DOMAIN_ID");
  const rcutils_allocator_t allocator = rcutils_get_default_allocator();

  rmw_init_options_t options = rmw_get_zero_initialized_init_options();
  check(rmw_init_options_init(&options, allocator) == RMW_RET_OK);
  options.domain_id = domain ? std::stoul(domain) : 0;
  options.enclave = rcutils_strdup("/", allocator);
  options.discovery_options.automatic_discovery_range = RMW_AUTOMATIC_DISCOVERY_RANGE_LOCALHOST;
  rmw_context_t context = rmw_get_zero_initialized_context();
  check(rmw_init(&options, &context) == RMW_RET_OK);
  rmw_node_t * node = rmw_create_node(&context, "print_items", "/");
  check(node != nullptr);

  const rmw_subscription_options_t subscription_options = rmw_get_default_subscription_options();
  rmw_subscription_t * subscription = rmw_create_subscription(
    node, rosidl_typesupport_cpp::get_message_type_support_handle<WasteItemArray>(),
    "/items", &rmw_qos_profile_default, &subscription_options);
  check(subscription != nullptr);

  WasteItemArray message;
  for (int received = 0; received < wanted; ) {
    bool taken = false;
    check(rmw_take(subscription, &message, &taken, nullptr) == RMW_RET_OK);
    if (!taken) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
      continue;
    }
    ++received;
    for (const WasteItem & item : message.items) {
      const auto & grasp = item.grasp.position;
      std::printf(
        "%s %s %.2f grasp %.3f %.3f %.3f jaw %.3f %s%s\n",
        message.header.frame_id.c_str(), item.class_id.c_str(), item.score,
        grasp.x, grasp.y, grasp.z, item.grasp_width,
        item.pickable ? "pickable" : item.reason.c_str(),
        (item.flags & WasteItem::FLAG_TOUCHING) ? " touching" : "");
    }
    std::fflush(stdout);
  }

  check(rmw_destroy_subscription(node, subscription) == RMW_RET_OK);
  check(rmw_destroy_node(node) == RMW_RET_OK);
  check(rmw_shutdown(&context) == RMW_RET_OK);
  check(rmw_context_fini(&context) == RMW_RET_OK);
  check(rmw_init_options_fini(&options) == RMW_RET_OK);
  return 0;
}
